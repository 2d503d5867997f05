"""The tests, benchmarks and stored experiments of the lab. Modules import each other by their bare names."""
