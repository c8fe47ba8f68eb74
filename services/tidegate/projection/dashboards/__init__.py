"""Grafana dashboards over the projection's views: panels as data here, JSON files for Grafana in `charts/tidegate/dashboards`."""
