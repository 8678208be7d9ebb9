"""What runs inside a hospital: its data, weights, policy, outbox and the ClientApp."""
