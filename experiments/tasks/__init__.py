"""Problems that need state: words over groups, recall, induction; pure functions of a seed."""
