"Fine-tune a language model on one home GPU. `plan`, `prepare`, `finetune`, `evaluate`, `chat` and `export` are loaded when first used."
import sys
from types import ModuleType

__version__ = "0.1.0"
__all__ = ['plan', 'prepare', 'finetune', 'evaluate', 'chat', 'export']


class _CallablePackage(ModuleType):
    "The packages `plan` and `evaluate` can be called: they stand for the functions of that name."
    def __call__(self, *args, **settings):
        from homelab_ft import api
        function = getattr(api, self.__name__.rpartition('.')[2])
        return function(*args, **settings)


class _Package(ModuleType):
    "Python sets a subpackage as an attribute when it is imported; those two become callable then."
    def __setattr__(self, name, value):
        if name in ('plan', 'evaluate'): value.__class__ = _CallablePackage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name):
    "PEP 562: called for names that are not there yet."
    if name == 'plan':
        import homelab_ft.plan  # noqa: F401
        return sys.modules['homelab_ft.plan']
    if name == 'evaluate':
        import homelab_ft.evaluate  # noqa: F401
        return sys.modules['homelab_ft.evaluate']
    if name in __all__:
        from homelab_ft import api
        return getattr(api, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__(): return [*globals(), *__all__]
