"""What api.py is made of: settings, jobs in SQLite, their files, one worker with the model, and the HTTP routes."""
