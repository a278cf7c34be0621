"""What the commands have in common, and the check of the installation."""
