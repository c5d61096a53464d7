//! `cdc-relay init`

use service::Failure;

use crate::{
    config::Settings,
    error::Error,
    slot::{self, Made},
};

/// Makes the publication and the slot where they are missing, and says which it did.
pub(super) fn init(settings: &Settings) -> Result<(), Failure> {
    let (publication, slot, confirmed) = slot::init(settings).map_err(Error::into_failure)?;
    let said = |made| match made {
        Made::Created => "created",
        Made::Existed => "exists",
    };
    println!("publication  {:<24} {}", settings.publication, said(publication));
    println!("slot         {:<24} {}, confirmed LSN {confirmed}", settings.slot, said(slot));
    Ok(())
}
