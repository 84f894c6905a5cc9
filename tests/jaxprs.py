"""Walking through what JAX traced."""

import jax


def equations(jaxpr):
    """Every equation of a jaxpr and of the jaxprs inside it, in order."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)
