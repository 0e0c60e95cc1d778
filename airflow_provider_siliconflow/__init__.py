"""Apache Airflow provider for the SiliconFlow batch inference API."""

from __future__ import annotations

__version__ = "0.1.0"
