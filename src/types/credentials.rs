//! Who the driver is to a Proxmox cluster, and where that is written.

use std::{fmt, path::PathBuf};

/// A text that is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Hides a text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text, for the request that carries it and for nothing else.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Where a part of the credentials is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// In the configuration.
    Inline(Secret),
    /// In a file, which is read again when it changes; blanks and line ends around the text don't count.
    File(PathBuf),
}

impl Source {
    /// A text of the configuration.
    pub fn inline(text: impl Into<String>) -> Self {
        Self::Inline(Secret::new(text))
    }
}

/// How the driver authenticates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credentials {
    /// With an API token.
    Token {
        /// `user@realm!name`.
        id: Source,
        /// The secret.
        secret: Source,
    },
    /// With a user's name and password, for which Proxmox gives a ticket for two hours.
    Login {
        /// `user@realm`.
        username: Source,
        /// The password.
        password: Source,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_never_printed() {
        let login =
            Credentials::Login { username: Source::inline("root@pam"), password: Source::inline("s3cret") };
        assert!(!format!("{login:?}").contains("s3cret"));
    }
}
