//! A row goes to Kafka, or where its policy says.

use std::time::Duration;

use relay_core::{Lsn, Relay, progress::Ticket};

use crate::{
    error::Error,
    kafka::{Offer, Producer},
};

/// Where a record went.
pub(crate) enum Placed {
    /// To the producer, or nowhere because its policy says so, or because the message was no row.
    Done,
    /// Nowhere yet: the record of this ticket is to be offered again.
    Later(Ticket),
}

/// Hands one message of the stream to the relay, and what it becomes to the producer.
pub(crate) fn place(
    relay: &mut Relay,
    producer: &mut Producer,
    start: Lsn,
    message: &[u8],
    now: Duration,
) -> Result<Placed, Error> {
    let Some(record) = relay.handle_wal(start, message, now)? else { return Ok(Placed::Done) };
    let (ticket, offer) = (record.ticket, producer.offer(&record)?);
    follow(relay, producer, ticket, message, offer)
}

/// The same of the last message once more, which the producer could not take.
pub(crate) fn place_again(
    relay: &mut Relay,
    producer: &mut Producer,
    ticket: Ticket,
    message: &[u8],
) -> Result<Placed, Error> {
    let Some(record) = relay.repeat(ticket, message)? else { return Ok(Placed::Done) };
    let offer = producer.offer(&record)?;
    follow(relay, producer, ticket, message, offer)
}

/// Does what follows from the producer's answer. What it refuses becomes what its policy says, which is offered in
/// its turn.
fn follow(
    relay: &mut Relay,
    producer: &mut Producer,
    ticket: Ticket,
    message: &[u8],
    mut offer: Offer,
) -> Result<Placed, Error> {
    loop {
        match offer {
            Offer::Taken => return Ok(Placed::Done),
            Offer::Later => return Ok(Placed::Later(ticket)),
            Offer::Refused(poison) => match relay.refuse(ticket, message, poison)? {
                None => return Ok(Placed::Done),
                Some(record) => offer = producer.offer(&record)?,
            },
        }
    }
}
