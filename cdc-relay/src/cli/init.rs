//! `cdc-relay init`

use service::Failure;

use crate::{
    config::Settings,
    error::Error,
    publication::Made,
    setup::{Desk, Report},
};

/// Makes the publication, the slot, the relay's own topics and the first checkpoint where they are missing, and says
/// which it did.
pub(super) fn init(settings: &Settings) -> Result<(), Failure> {
    let desk = Desk::open(settings).map_err(Error::into_failure)?;
    let topics = desk.topics.clone();
    let Report { publication, slot, confirmed, checkpoint } = desk.init().map_err(Error::into_failure)?;
    let said = |made| match made {
        Made::Created => "created",
        Made::Existed => "exists",
    };
    println!("publication  {:<24} {}", settings.publication, said(publication));
    println!("slot         {:<24} {}, confirmed LSN {confirmed}", settings.slot, said(slot));
    for (topic, made) in topics {
        println!("topic        {topic:<24} {}", said(made));
    }
    println!("checkpoint   {:<24} {}", settings.slot, said(checkpoint));
    Ok(())
}
