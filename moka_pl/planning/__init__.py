"""What a run will take, told before anything is downloaded: parameters, memory, steps, time."""
