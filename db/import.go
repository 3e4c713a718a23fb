package db

import (
	"context"
	"encoding/json"

	"github.com/jackc/pgx/v5"
)

// ImportRow is an account that comes with its hash.
type ImportRow struct {
	Tenant       TenantID
	User         UserID
	Email        Email
	PasswordHash string
	Disabled     bool
	Claims       json.RawMessage // a JSON object
}

// ImportOutcome is what became of a row.
type ImportOutcome string

// The outcomes of ImportAccounts.
const (
	ImportCreated  ImportOutcome = "created"
	ImportPresent  ImportOutcome = "present"  // the same person is there already; nothing was changed
	ImportConflict ImportOutcome = "conflict" // the user id or the e-mail belongs to someone else
)

// ImportAccounts creates what is not there yet, with its events, in one
// transaction: the rows of a batch that was cut off are all there or none is.
func (s *Store) ImportAccounts(ctx context.Context, rows []ImportRow, traceID string) ([]ImportOutcome, error) {
	var tenants []TenantID
	var users []UserID
	var emails, hashes []string
	var disabled []bool
	var claims []json.RawMessage
	for _, r := range rows {
		tenants, users, emails = append(tenants, r.Tenant), append(users, r.User), append(emails, r.Email.s)
		hashes, disabled, claims = append(hashes, r.PasswordHash), append(disabled, r.Disabled), append(claims, r.Claims)
	}
	var outcomes []ImportOutcome
	// The outer statement's snapshot is older than what the CTE inserts, so the
	// answer is put together from both: created by this statement, or there
	// before it. A row that another transaction inserts at this moment is
	// reported as a conflict; a second run finds it present.
	err := s.queryRow(ctx, []any{&outcomes}, `
WITH input AS (
    SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::boolean[], $6::json[])
        WITH ORDINALITY AS i(tenant_id, user_id, email, password_hash, disabled, claims, n)
), created AS (
    INSERT INTO accounts (tenant_id, user_id, email, password_hash, disabled_at, claims)
    SELECT tenant_id, user_id, email, password_hash, CASE WHEN disabled THEN clock_timestamp() END, claims FROM input ORDER BY n
        ON CONFLICT DO NOTHING
    RETURNING tenant_id, user_id, email
), event AS (`+insertEvents+`
    SELECT 'auth.user.imported', tenant_id, user_id, $7, NULL, jsonb_build_object('user_id', user_id, 'email', email) FROM created
)
SELECT array_agg(CASE WHEN a.email IS NOT NULL THEN CASE WHEN a.email = i.email THEN 'present' ELSE 'conflict' END
                      WHEN c.email = i.email AND i.n = first.n THEN 'created'
                      WHEN c.email = i.email THEN 'present'
                      ELSE 'conflict' END ORDER BY i.n)
  FROM input AS i
  JOIN (SELECT tenant_id, user_id, min(n) AS n FROM input GROUP BY tenant_id, user_id) AS first USING (tenant_id, user_id)
  LEFT JOIN accounts AS a USING (tenant_id, user_id)
  LEFT JOIN created AS c USING (tenant_id, user_id)`, tenants, users, emails, hashes, disabled, claims, traceID)
	if err == nil {
		s.wakeRelay()
	}
	return outcomes, err
}

// FirstVersionAccounts calls f with each row of the first version's table
// credentials, which lives in schema public of the same database.
func (s *Store) FirstVersionAccounts(ctx context.Context, f func(tenant, user, email, hash string, active bool) error) error {
	return s.Alone(ctx, func(conn *Conn) error {
		rows, err := conn.Query(ctx, `SELECT tenant_id::text, user_id::text, email, password_hash, is_active FROM public.credentials ORDER BY tenant_id, user_id`)
		if err != nil {
			return err
		}
		var tenant, user, email, hash string
		var active bool
		_, err = pgx.ForEachRow(rows, []any{&tenant, &user, &email, &hash, &active}, func() error {
			return f(tenant, user, email, hash, active)
		})
		return err
	})
}
