"""Training on latents: the step, its data and its states, and the job behind `qvdjax train`."""
