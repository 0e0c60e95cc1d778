"""Scoring of question sets and a leaderboard page. Plain Python: no Airflow import in here."""
