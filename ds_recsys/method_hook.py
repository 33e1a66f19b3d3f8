"""A method of one object with something around it, until the hook is removed."""

import functools
from collections.abc import Callable


class MethodHook:
    """`owner.name(...)` becomes `around(method, ...)`; the class and other objects of it keep their method.

    Hooks on the same method nest and come off in any order; one below another lets calls through until that one goes.
    """

    def __init__(self, owner, name: str, around: Callable):
        self._owner, self._name, self._active = owner, name, True
        self._own = vars(owner).get(name)  # what the object itself held in place of the class's
        method = getattr(owner, name)

        @functools.wraps(method)
        def hooked(*args, **kwargs):
            return around(method, *args, **kwargs) if self._active else method(*args, **kwargs)

        hooked.hook = self
        self._hooked = hooked
        setattr(owner, name, hooked)

    def remove(self) -> None:
        self._active = False
        if vars(self._owner).get(self._name) is not self._hooked:
            return
        own = self._own
        while (below := getattr(own, "hook", None)) and not below._active:
            own = below._own
        if own is None:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, own)
