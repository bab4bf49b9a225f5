"""What is known before a run: its schedules as a picture, its layout, memory and time."""
