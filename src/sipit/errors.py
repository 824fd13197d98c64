"""Every exception this package raises on purpose.

    SipitError
    ├── OptionError        (ValueError)       an argument outside its range: layer, site, policy, device
    ├── ModelError         (ValueError)       a model that cannot be loaded, cut or trusted
    │   └── FetchError     (ConnectionError)  a pinned model or a data set that could not be fetched
    ├── InputError         (ValueError)       a file or array that is not what it claims to be
    │   ├── ShapeError                        wrong number of dimensions, or wrong width
    │   ├── NonFiniteError                    NaN or infinity among the states
    │   └── MismatchError                     states of another model, layer or site
    ├── CertificateError   (ValueError)       a certificate that cannot be read
    └── StorageError       (OSError)          a path that cannot be read or written

Each message is one sentence or two: what is wrong, where, what was expected, and the way out.
"""


class SipitError(Exception):
    """Base of all errors raised on purpose."""


class OptionError(SipitError, ValueError):
    """An argument lies outside its range."""


class ModelError(SipitError, ValueError):
    """A model cannot be loaded, cut after a layer, or trusted."""


class FetchError(ModelError, ConnectionError):
    """A pinned model or a data set could not be fetched, or a checksum is wrong."""


class InputError(SipitError, ValueError):
    """A file or an array is not what it claims to be."""


class ShapeError(InputError):
    """An array has the wrong number of dimensions or the wrong width."""


class NonFiniteError(InputError):
    """An array holds NaN or infinity."""


class MismatchError(InputError):
    """States belong to another model, layer or site."""


class CertificateError(SipitError, ValueError):
    """A certificate cannot be read."""


class StorageError(SipitError, OSError):
    """A path cannot be read or written."""
