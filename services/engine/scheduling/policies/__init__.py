"""Who is admitted, in what order, and who is dropped: small objects that the scheduler asks."""
