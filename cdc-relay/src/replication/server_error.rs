//! What the server says when something is wrong
//! (<https://www.postgresql.org/docs/current/protocol-error-fields.html>).

use crate::error::Error;

/// The fields of an `ErrorResponse` that we tell: SQLSTATE and message.
pub(super) fn error_fields(body: &[u8]) -> (String, String) {
    (field(body, b'C'), field(body, b'M'))
}

/// The routine of the server that says it: unlike the message it is in no language.
pub(super) fn routine(body: &[u8]) -> String {
    field(body, b'R')
}

fn field(body: &[u8], tag: u8) -> String {
    let found = body.split(|b| *b == 0).find(|f| f.first() == Some(&tag));
    found.map_or_else(String::new, |f| String::from_utf8_lossy(&f[1..]).into_owned())
}

/// An `ErrorResponse` as an error of ours.
pub(super) fn server_error(body: &[u8]) -> Error {
    let (sqlstate, message) = error_fields(body);
    Error::postgres(&sqlstate, &message)
}
