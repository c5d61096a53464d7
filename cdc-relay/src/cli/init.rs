//! `cdc-relay init`

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use service::{Failure, exit, shutdown::Shutdown};

use crate::{
    backfill::{Backfilled, Plan},
    config::Settings,
    error::Error,
    publication::Made,
    setup::{Desk, Report},
    slot::Failover,
    snapshot::OrderBy,
};

#[derive(Debug, clap::Args)]
pub(super) struct Init {
    /// Publish first what is in the outbox already, as it is when the slot is made; then what comes later is streamed.
    /// It needs SELECT on the outbox, and a slot that is not there yet
    #[arg(long, requires = "order_by")]
    backfill: bool,
    /// In which order: columns of the outbox, e.g. `created_at` or `day, seq desc`; the id decides between equals
    #[arg(long, value_name = "COLUMNS", requires = "backfill")]
    order_by: Option<OrderBy>,
    /// Only rows that meet this condition of SQL, e.g. `processed_at IS NULL`
    #[arg(long = "where", value_name = "SQL", requires = "backfill")]
    filter: Option<String>,
}

/// Makes the publication, the slot, the relay's own topics and the first checkpoint where they are missing, and says
/// which it did.
pub(super) fn init(settings: &Settings, command: Init) -> Result<(), Failure> {
    service::logs::init(&settings.log)?;
    let desk = Desk::open(settings).map_err(Error::into_failure)?;
    let topics = desk.topics.clone();
    let (report, backfilled) = match command.order_by {
        None => (desk.init().map_err(Error::into_failure)?, None),
        Some(order) => {
            let stop = stop_on_signals()?;
            let plan = Plan { order, filter: command.filter };
            let (report, done) = desk.backfill(&plan, &stop).map_err(Error::into_failure)?;
            (report, Some(done))
        }
    };
    let Report { publication, slot, confirmed, failover, checkpoint, repeats } = report;
    let said = |made| match made {
        Made::Created => "created",
        Made::Existed => "exists",
    };
    service::say!("publication  {:<24} {}", settings.publication, said(publication));
    let synchronised = match failover {
        Failover::Off => "",
        Failover::On => ", synchronised to standbys",
        Failover::SwitchedOn => ", synchronised to standbys from now on",
        Failover::InUse => ", NOT synchronised to standbys",
    };
    service::say!(
        "slot         {:<24} {}, confirmed LSN {confirmed}{synchronised}",
        settings.slot,
        said(slot)
    );
    for (topic, made) in topics {
        service::say!("topic        {topic:<24} {}", said(made));
    }
    if let Some(Backfilled { rows, diverted }) = backfilled {
        service::say!(
            "backfill     {:<24} {rows} rows published, {diverted} of them otherwise than usual",
            settings.slot
        );
    }
    if let Some(repeats) = repeats {
        service::say!("repeats      {:<24} {repeats}", settings.slot);
    }
    service::say!("checkpoint   {:<24} {}", settings.slot, said(checkpoint));
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

/// What SIGTERM and SIGINT set.
fn stop_on_signals() -> Result<Arc<AtomicBool>, Failure> {
    let internal =
        |e: std::io::Error| Failure::new(exit::Kind::Internal, format!("cannot listen for signals: {e}"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(internal)?;
    let (_, shutdown) = runtime.block_on(async { Shutdown::on_signals() })?;
    let stop = Arc::new(AtomicBool::new(false));
    let asked = Arc::clone(&stop);
    // It ends with the process.
    std::thread::spawn(move || {
        runtime.block_on(shutdown.requested());
        asked.store(true, Ordering::Relaxed);
    });
    Ok(stop)
}
