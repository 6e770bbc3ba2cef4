//! Tasks that outlive their callers.
