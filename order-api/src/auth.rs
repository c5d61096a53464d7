//! Who asks.

/// The client of a request: the name of its token, empty where none is asked for. Every request to a route below
/// `/api` has it among its extensions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Client(pub(crate) String);
