"""One package per framework. Importing this one imports none of them."""
