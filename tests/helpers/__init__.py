"""What tests share: builders, environments, and programs that tests start."""
