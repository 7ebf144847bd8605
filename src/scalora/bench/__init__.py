"""What training costs: steps and rescales measured, their lower bounds, estimates. May import `report` and below."""
