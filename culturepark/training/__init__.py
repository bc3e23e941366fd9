"""From a run's samples to tuned models: sealed datasets, launches that are neither forgotten nor repeated,
adapters that can be served at once. Nothing here needs Ray, and only `lora` and `base` need torch."""
