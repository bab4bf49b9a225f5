"""What guards a run: who is there when it starts, what it waits for, what its replicas hold, and what its losses do."""
