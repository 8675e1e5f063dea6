"""`epops.inspect`: what the compiler did with a model's exchanges."""
