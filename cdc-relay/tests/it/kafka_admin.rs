//! Kafka's users and permissions, which the client library has no calls for: three requests of its protocol, written
//! out (<https://kafka.apache.org/protocol>).

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    num::NonZeroU32,
};

use crate::database::eventually;

const DESCRIBE_ACLS: (u16, u16) = (29, 1);
const CREATE_ACLS: (u16, u16) = (30, 1);
const ALTER_USER_SCRAM_CREDENTIALS: (u16, u16) = (51, 0);
const ITERATIONS: u32 = 4096;

/// `org.apache.kafka.common.resource.ResourceType.TOPIC`
const TOPIC: u8 = 2;
/// `org.apache.kafka.common.resource.ResourceType.TRANSACTIONAL_ID`
const TRANSACTIONAL_ID: u8 = 5;
/// `org.apache.kafka.common.resource.PatternType`
const LITERAL: u8 = 3;
const PREFIXED: u8 = 4;

/// The numbers are those of `org.apache.kafka.common.acl.AclOperation`.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Operation {
    Read = 3,
    Write = 4,
    Describe = 8,
    DescribeConfigs = 10,
}

/// Lets `principal` (`User:…`) do `operation` on a topic.
pub(crate) fn allow(broker: &str, principal: &str, operation: Operation, topic: &str) {
    create_acl(broker, principal, operation, (TOPIC, topic, LITERAL));
}

/// Lets `principal` do `operation` with the transactional ids that begin with `prefix`.
pub(crate) fn allow_transactions(broker: &str, principal: &str, operation: Operation, prefix: &str) {
    create_acl(broker, principal, operation, (TRANSACTIONAL_ID, prefix, PREFIXED));
}

fn create_acl(
    broker: &str,
    principal: &str,
    operation: Operation,
    (resource, name, pattern): (u8, &str, u8),
) {
    let mut acl = vec![resource];
    string(&mut acl, name);
    acl.push(pattern);
    string(&mut acl, principal);
    string(&mut acl, "*");
    acl.extend([operation as u8, 3]); // allow
    let answer = request(broker, CREATE_ACLS, b"", &[&1i32.to_be_bytes(), &*acl].concat());
    // Correlation id, throttle time, one result, its error code.
    assert_eq!(answer[12..14], [0, 0], "{}", String::from_utf8_lossy(&answer));
    // The controller has it; the broker, which decides and which is asked here, is a moment behind.
    eventually("the broker knows the permission", || {
        let answer = request(broker, DESCRIBE_ACLS, b"", &acl);
        // Correlation id, throttle time, no error and an empty text of it, and how many resources were found.
        assert_eq!(answer[8..12], [0; 4], "{}", String::from_utf8_lossy(&answer));
        (answer[12..16] != [0; 4]).then_some(())
    });
}

/// Makes a user with a password, for SCRAM-SHA-512.
pub(crate) fn add_user(broker: &str, name: &str, password: &str) {
    let salt = b"0123456789abcdef";
    let mut salted = [0; 64];
    let iterations = NonZeroU32::new(ITERATIONS).unwrap();
    ring::pbkdf2::derive(
        ring::pbkdf2::PBKDF2_HMAC_SHA512,
        iterations,
        salt,
        password.as_bytes(),
        &mut salted,
    );
    // No deletions, one change. Compact lengths are one more than they say; 0 tags.
    let mut body = vec![1, 2];
    compact(&mut body, name.as_bytes());
    body.push(2); // SCRAM-SHA-512
    body.extend(ITERATIONS.to_be_bytes());
    compact(&mut body, salt);
    compact(&mut body, &salted);
    body.extend([0, 0]);
    let answer = request(broker, ALTER_USER_SCRAM_CREDENTIALS, &[0], &body);
    // Correlation id, tags, throttle time, one result: the user, an error code.
    let code = 4 + 1 + 4 + 1 + 1 + name.len();
    assert_eq!(answer[code..code + 2], [0, 0], "{}", String::from_utf8_lossy(&answer));
}

fn string(into: &mut Vec<u8>, text: &str) {
    into.extend(u16::try_from(text.len()).unwrap().to_be_bytes());
    into.extend(text.as_bytes());
}

fn compact(into: &mut Vec<u8>, bytes: &[u8]) {
    into.push(u8::try_from(bytes.len() + 1).unwrap());
    into.extend(bytes);
}

/// `tags` end the header in the flexible versions.
fn request(broker: &str, (key, version): (u16, u16), tags: &[u8], body: &[u8]) -> Vec<u8> {
    let mut message = [key.to_be_bytes(), version.to_be_bytes()].concat();
    message.extend(7u32.to_be_bytes());
    string(&mut message, "test");
    message.extend(tags);
    message.extend(body);
    let mut connection = TcpStream::connect(broker).unwrap();
    connection.write_all(&u32::try_from(message.len()).unwrap().to_be_bytes()).unwrap();
    connection.write_all(&message).unwrap();
    let mut size = [0; 4];
    connection.read_exact(&mut size).unwrap();
    let mut answer = vec![0; usize::try_from(u32::from_be_bytes(size)).unwrap()];
    connection.read_exact(&mut answer).unwrap();
    answer
}
