-- Run once, when PostgreSQL makes its data folder: the service's own role. It
-- owns its database and nothing else.
\set password `cat /docker-entrypoint-initdb.d/identity_auth`
CREATE ROLE identity_auth LOGIN PASSWORD :'password';
CREATE DATABASE identity_auth OWNER identity_auth;
REVOKE CONNECT ON DATABASE identity_auth FROM PUBLIC;
