"""GPU, CPU and SSD as one memory of hard capacities."""
