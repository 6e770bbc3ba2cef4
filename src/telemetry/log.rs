//! Logs: to standard error, as text for people or JSON for collectors.
//!
//! error: an act that was asked for failed and a person must look; warn: odd, and handled; info: state changed; debug: each request and
//! command.

use std::{fmt, str::FromStr};

use tracing_subscriber::EnvFilter;

/// An error and its causes as one line, each text once: for the edge, where an error is told to somebody.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err("it must be text or json".to_owned()),
        }
    }
}

/// Starts logging. `verbosity` follows klog: 5 and above logs each request and command, 0 errors only. The environment variable `RUST_LOG` overrides it.
pub fn start(verbosity: u8, format: Format) {
    let default = match verbosity {
        0 => "error",
        1..5 => "warn,proxmox_csi=info",
        _ => "warn,proxmox_csi=debug",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    // A second start in one process keeps the first one's settings.
    let _ = match format {
        Format::Text => builder.with_ansi(false).try_init(),
        Format::Json => builder.json().flatten_event(true).try_init(),
    };
}
