"""Scoring of question sets, and a leaderboard page. Plain Python without Airflow imports."""
