"""What a whole run of private messages tells of one patient, and what a site refuses."""
