"""culturepark: culturally diverse training data from dialogues between agents of different cultures.

The domain: works with no Ray installed. `actors/` gives it processes; `scripts/` starts it.
"""

__version__ = "0.1.0"
