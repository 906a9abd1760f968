"""Stepladder's brain: catalogue, planner, checks. Plain Python, no Ansible in here."""
