"""Fine-tuning: tasks on the trainer."""
