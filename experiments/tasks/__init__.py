"""Problems that ask for state: words over groups, recall, induction; pure functions of a seed."""
