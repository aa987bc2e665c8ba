"""What every service needs and no service owns: settings, errors, gRPC set-up, telemetry. No business logic."""
