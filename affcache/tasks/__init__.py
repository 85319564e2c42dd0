"""What is predicted: tasks, their losses and metrics, label files, and which frames belong together."""
