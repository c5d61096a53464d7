//! What the fuzz targets do with their bytes. The core's own tests run the same functions over the corpus.

mod encode;
mod session;

use relay_core::pgoutput::{Message, decode};

pub use session::{Event, events, stream};

/// One message of pgoutput: an error with a text, or a message that keeps its word and encodes back to its bytes.
pub fn pgoutput(bytes: &[u8]) {
    let message = match decode(bytes) {
        Ok(message) => message,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    match message {
        Message::Relation(relation) => {
            let columns: usize = relation.columns().map(|c| 1 + c.name.len() + 1 + 4 + 4).sum();
            let names = relation.schema.len() + 1 + relation.name.len() + 1;
            assert_eq!(1 + 4 + names + 1 + 2 + columns, bytes.len());
        }
        Message::Insert { row, .. } => assert_eq!(row.values().count(), row.len()),
        _ => {}
    }
    if let Some(again) = encode::message(message) {
        assert_eq!(again, bytes, "{message:?}");
    }
}
