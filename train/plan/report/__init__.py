"""What a plan tells: a screen, a page, plan.json."""
