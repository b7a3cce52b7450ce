"""Floor 4: who owns which user, and the one door to the world."""
