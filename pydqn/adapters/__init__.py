"""Parts of pydqn in the clothes of other libraries: each room knows one of them."""
