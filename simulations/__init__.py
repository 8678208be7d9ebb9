"""Many hospitals on one machine: cohorts, partitions, engines and controls."""
