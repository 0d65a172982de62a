"""Other projects' models, faster without a change to their code."""
