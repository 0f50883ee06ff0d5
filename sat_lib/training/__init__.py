"""The three phases: recipe, transition, steps, and runs with their folders."""
