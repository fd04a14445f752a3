//! Errors of methods that take a value: they return it.

/// Gives an error type that has the fields `error` and one more the methods and conversions that all such
/// types have: `error`, `kind`, `into_parts`, [`std::error::Error`], and `?` into an [`Error`](crate::Error)
/// or an [`io::Error`](std::io::Error).
macro_rules! gives_back {
    ($type:ident $(<$generic:ident>)? { $value:ident: $of:ty }, $parts:literal) => {
        impl$(<$generic>)? $type$(<$generic>)? {
            /// What went wrong.
            pub fn error(&self) -> &$crate::Error {
                &self.error
            }

            /// The kind of the error.
            pub fn kind(&self) -> $crate::ErrorKind {
                self.error.kind()
            }

            #[doc = $parts]
            pub fn into_parts(self) -> ($crate::Error, $of) {
                (self.error, self.$value)
            }
        }

        impl$(<$generic>)? From<$type$(<$generic>)?> for $crate::Error {
            fn from(failed: $type$(<$generic>)?) -> Self {
                failed.error
            }
        }

        impl$(<$generic>)? From<$type$(<$generic>)?> for std::io::Error {
            fn from(failed: $type$(<$generic>)?) -> Self {
                failed.error.into()
            }
        }

        impl$(<$generic>)? std::fmt::Display for $type$(<$generic>)? {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                std::fmt::Display::fmt(&self.error, f)
            }
        }

        impl$(<$generic: std::fmt::Debug>)? std::error::Error for $type$(<$generic>)? {
            fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
                std::error::Error::source(&self.error)
            }
        }
    };
}

pub(crate) use gives_back;
