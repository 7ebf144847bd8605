"""One training run as a library: settings, data, models, training, scores, export. May import `rivals` and below."""
