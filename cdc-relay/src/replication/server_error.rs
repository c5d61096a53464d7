//! What the server says when something is wrong
//! (<https://www.postgresql.org/docs/current/protocol-error-fields.html>).

use crate::error::Error;

/// The fields of an `ErrorResponse` that we tell: SQLSTATE and message.
pub(super) fn error_fields(body: &[u8]) -> (String, String) {
    let field = |tag: u8| {
        let found = body.split(|b| *b == 0).find(|f| f.first() == Some(&tag));
        found.map_or_else(String::new, |f| String::from_utf8_lossy(&f[1..]).into_owned())
    };
    (field(b'C'), field(b'M'))
}

/// An `ErrorResponse` as an error of ours.
pub(super) fn server_error(body: &[u8]) -> Error {
    let (sqlstate, message) = error_fields(body);
    Error::postgres(&sqlstate, &message)
}
