//! `cdc-relay init`

use service::{Failure, exit};

use crate::{
    config::Settings,
    error::Error,
    publication::Made,
    setup::{Desk, Report},
    slot::Failover,
};

/// Makes the publication, the slot, the relay's own topics and the first checkpoint where they are missing, and says
/// which it did.
pub(super) fn init(settings: &Settings) -> Result<(), Failure> {
    service::logs::init(&settings.log)?;
    let desk = Desk::open(settings).map_err(Error::into_failure)?;
    let topics = desk.topics.clone();
    let Report { publication, slot, confirmed, failover, checkpoint } =
        desk.init().map_err(Error::into_failure)?;
    let said = |made| match made {
        Made::Created => "created",
        Made::Existed => "exists",
    };
    println!("publication  {:<24} {}", settings.publication, said(publication));
    let synchronised = match failover {
        Failover::Off => "",
        Failover::On => ", synchronised to standbys",
        Failover::SwitchedOn => ", synchronised to standbys from now on",
        Failover::InUse => ", NOT synchronised to standbys",
    };
    println!("slot         {:<24} {}, confirmed LSN {confirmed}{synchronised}", settings.slot, said(slot));
    for (topic, made) in topics {
        println!("topic        {topic:<24} {}", said(made));
    }
    println!("checkpoint   {:<24} {}", settings.slot, said(checkpoint));
    if failover == Failover::InUse {
        let what = format!(
            "slot {:?} is not synchronised to standbys, as postgres.failover = true wants it, and cannot be changed while a relay \
             streams from it",
            settings.slot
        );
        return Err(Failure::new(exit::Kind::GaveUp, what)
            .hint("stop every relay of this slot, then run `cdc-relay init` again"));
    }
    Ok(())
}
