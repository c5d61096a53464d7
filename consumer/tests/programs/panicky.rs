//! A handler that panics at some events, in each way it can. For the tests.

use std::process::ExitCode;

use consumer::{Event, Fault, Handler, Offer, Poison, Record};
use sqlx::PgConnection;
use uuid::Uuid;

/// The record's key says what happens.
struct Word {
    id: Uuid,
    text: String,
}

impl Event for Word {
    fn parse(record: &Record<'_>) -> Result<Self, Poison> {
        let text = String::from_utf8_lossy(record.key.unwrap_or_default()).into_owned();
        assert!(!text.starts_with("parse"), "cannot stand {text}");
        Ok(Self {
            id: Uuid::from_bytes(record.value.unwrap_or_default().try_into().unwrap_or([0; 16])),
            text,
        })
    }

    fn id(&self) -> Uuid {
        self.id
    }

    fn type_name(&self) -> &'static str {
        "Word"
    }
}

struct Panicky;

impl Handler for Panicky {
    type Event = Word;

    const SCHEMA: &'static str = "CREATE TABLE IF NOT EXISTS words (text text NOT NULL)";

    async fn apply(&self, transaction: &mut PgConnection, events: &[&Word]) -> Result<(), Fault> {
        for event in events {
            sqlx::query("INSERT INTO words VALUES ($1)").bind(&event.text).execute(&mut *transaction).await?;
            assert!(!event.text.starts_with("apply"), "cannot stand {}", event.text);
            if event.text.starts_with("transient") {
                return Err(Fault::Transient("the weather".into()));
            }
        }
        Ok(())
    }
}

fn main() -> ExitCode {
    consumer::main(vec![Offer::new("panicky", None, |_| Ok(Panicky))])
}
